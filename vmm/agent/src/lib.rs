//! The agent: sessions, journal, jobs, API.
