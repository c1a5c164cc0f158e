package launches

import "cloudlet/integration/appguest"

func node() Application {
	return Application{
		Name: "node", About: "a service of Node.js with its records in memory", packages: []string{"nodejs"},
		steps: func(string) []appguest.Step {
			return []appguest.Step{{Title: "start the service", Lines: []string{
				"cp /opt/node/records.service /etc/systemd/system/",
				"systemctl daemon-reload && systemctl enable --now records.service",
			}}}
		},
	}
}
