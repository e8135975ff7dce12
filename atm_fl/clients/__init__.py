"""The Flower side of a party: ClientApp and its mods."""
