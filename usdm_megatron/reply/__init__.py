"""Does it listen and answer: the original's three-step inference on an exported model, and its error rates."""
