//! Part of kvarn; see ARCHITECTURE.md.
