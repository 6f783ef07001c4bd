"""From speech units, text and dialogs to samples of token ids."""
