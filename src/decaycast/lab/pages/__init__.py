"""The pages: what they share, their plots and lists, and the sweep's own."""
