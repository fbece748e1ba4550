"""`verl report`: one HTML page about one or several runs, with everything that it needs inside."""
