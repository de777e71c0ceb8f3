"""The YAML recipes; a package only so that an installed `foam` finds them."""
