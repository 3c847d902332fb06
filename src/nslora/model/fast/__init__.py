"""The same numbers in less time: skip this package on a first reading.

Nothing here changes what is computed, only how; each module says what it replaces and which test holds both equal.

| module    | replaces                                              | by                                          |
| --------- | ----------------------------------------------------- | ------------------------------------------- |
| packing   | padded batches, and a head that runs at all positions | one sequence, and a head at answers only    |
| attention | attention over all pairs of tokens behind a mask      | attention of each packed row by itself      |
| decode    | `generate`                                            | one prefill of the common prefix, rows leave|
| kernels   | layers of torch, transformers and PEFT                | fewer passes over memory, blocked weights   |
| memory    | a batch size that somebody has to find                | halves of what did not fit                  |
"""
