"""Commands: one file each; ``v4 --help`` lists them."""
