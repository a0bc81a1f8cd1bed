"""What the method costs: `settings` names everything, `cases` says what is measured, `measure` measures it."""
