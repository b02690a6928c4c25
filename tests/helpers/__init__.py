"""What tests share: nets with their recurrences by hand, comparisons, and stand-ins."""
