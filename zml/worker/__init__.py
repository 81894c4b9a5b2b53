"""The script's side: `zml.join` and the other calls, and behind them gradients, parameters and batches on their way.

Rule: the model is not wrapped and the optimizer not replaced; public hooks do all of it. The process is its agent's."""
