"""The frontier: quality against expert loads, of routers, levers, cache sizes and policies on one axis."""
