"""One image over HTTP, from a web that is not our friend."""
