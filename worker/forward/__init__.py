"""Where components are called: what may meet in one forward, how calls become one, and what stands around it."""
