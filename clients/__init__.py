"""What Flower ships as the clients' app."""
