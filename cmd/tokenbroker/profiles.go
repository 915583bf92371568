package main

func profiles() []string { return []string{"generic", "keycloak"} }
