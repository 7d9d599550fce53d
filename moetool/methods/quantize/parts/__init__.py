"""What ways of rounding compute: solving in the walk, turned weights, sensitivities."""
