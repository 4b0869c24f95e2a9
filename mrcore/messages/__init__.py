"""What crosses a wall between machines and processes, as types with bounds: what a peer may send stands here only.

A node may be broken, of another release, or in somebody else's hands. So nothing of what it sends is used before its
types, names and numbers are those that an honest node can send; what does not fit is `Malformed`, a ClusterFault that
names the node: the queue holds, and no job fails for it. Names that become parts of paths match strict patterns.
"""
