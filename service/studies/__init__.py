"""Studies of many facts: where they are carried, and whether that says where they are edited best."""
