"""`python -m usdm_megatron.cli VERB …`: what torchrun and the example scripts start."""

from usdm_megatron.cli import console_main

if __name__ == "__main__":
    console_main()
