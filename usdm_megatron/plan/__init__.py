"""Will it fit, how fast will it be, on which layout: answered from the modules that will train."""
