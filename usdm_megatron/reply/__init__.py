"""Does it listen and answer: three-step inference with an exported model, and its error rates."""
