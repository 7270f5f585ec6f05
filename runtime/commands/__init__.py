"""The commands of the runtime and the functions behind them; `python -m runtime.ask` runs one."""
