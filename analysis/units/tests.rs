//! Units of small graphs, one for each family.
