"""The model that is trained: loaded, frozen but for its routers, and observed."""
