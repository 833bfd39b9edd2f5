"""Router fine-tuning: routers, losses, one loop, checkpoints, tracking."""
