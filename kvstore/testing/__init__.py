"""Contract suites, wrappers and samples for tests of kvstore and of its plug-ins."""
