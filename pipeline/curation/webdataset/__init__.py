"""WebDatasets: tars in which the files of a sample have one name, as an input and as an output."""
