//! Small graphs and what is inferred about them.
