"""The converter: both directions, tokenizer, new rows, bad input."""
