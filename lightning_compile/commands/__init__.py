"""One module for each command of `lightning-compile`; `lightning_compile.cli` names them."""
