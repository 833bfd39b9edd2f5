"""What is optimised: terms, coefficients and the losses behind them."""
