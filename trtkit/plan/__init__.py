"""Pure arithmetic: memory, roofline, forecast, cost, search. No framework is imported here."""
