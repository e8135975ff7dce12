"""The Flower side of the server: ServerApp, strategy, grids."""
