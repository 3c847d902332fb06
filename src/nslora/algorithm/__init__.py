"""Algorithm 1: read loop, router, monitor, needs, numerical, symbolic, remake, session, in this order."""
