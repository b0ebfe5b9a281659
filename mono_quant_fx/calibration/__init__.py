"""What data says about weights' inputs: observers, layer inputs, and rounding one weight after the other."""
