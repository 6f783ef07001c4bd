"""LoRA: adapters beside the frozen linear layers of any layer spec, and trainable rows of new token ids."""
