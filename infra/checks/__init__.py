"""What can be said of the manifests with no cluster: schemas, CEL rules, our rules, security."""
