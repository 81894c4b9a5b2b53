"""`zml coordinator`: events in, the machine of `zml.scheduler` decides, actions out; each subject has a desk.

Rule: nothing here loads torch, and what must survive is in the journal before anybody hears of it."""
