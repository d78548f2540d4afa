"""Stages inside the blocks of vision encoders, whichever library the encoder is of."""
