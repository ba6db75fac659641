//! Costs of small graphs.
