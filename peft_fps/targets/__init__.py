"""Which modules an adapter changes, and which it trains whole.

| module | subject |
|---|---|
| `base_parameters` | the parameters of the base model, of which a budget is a share |
| `default_targets` | the modules that are adapted by default |
| `target_checks` | what is checked of an adapter's name and of its targets |
| `obstacle` | what keeps a module from being adapted |
| `whole_modules`, `whole_checks` | modules that are trained and saved whole, such as the head |
"""
