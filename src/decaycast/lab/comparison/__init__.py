"""What `decaycast.lab.compare` is made of: arms, their training, and what can be said of them."""
