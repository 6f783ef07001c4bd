"""The tokenizer that a model, a store and a checkpoint share: read, extend, recognise."""
