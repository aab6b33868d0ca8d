"""What a torch trainer declares at the handshake: facts about its model, and lists of names."""
