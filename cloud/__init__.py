"""The cloud side of Isthmus: gateway, registry, fleet service, and the Triton server behind them.

A request goes gateway -> heavy -> triton; an update goes registry -> publish -> catalog -> fleet.
`bootstrap` wires the parts.
"""
