"""HiPrune for TokenReduce."""
