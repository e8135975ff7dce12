"""What Flower ships as the server's app."""
