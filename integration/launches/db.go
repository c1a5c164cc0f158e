package launches

import (
	"fmt"

	"cloudlet/integration/appguest"
)

// What pgbench makes: Scale times 100 000 accounts, and transactions of some clients on them.
const (
	Scale        = 5
	Clients      = 4
	Transactions = 250 // of each client
)

// programs is where Debian has those of PostgreSQL.
const programs = "/usr/lib/postgresql/15/bin/"

func database() Application {
	a := Application{Name: "db", About: "PostgreSQL 15 with pgbench's tables", packages: []string{"postgresql"}}
	as := func(program string) string { return "runuser -u postgres -- " + programs + program }
	a.steps = func(string) []appguest.Step {
		return []appguest.Step{
			{Title: "start PostgreSQL as the guest wants it", Lines: []string{
				"cp /opt/db/postgresql.conf /etc/postgresql/15/main/conf.d/guest.conf",
				"systemctl restart postgresql@15-main.service",
			}},
			{Title: fmt.Sprintf("make %d accounts", Scale*100_000), Lines: []string{
				as("createdb bench"),
				as(fmt.Sprintf("pgbench -i -q -s %d bench", Scale)),
				as("psql -X -q -v ON_ERROR_STOP=1 -f /opt/db/launch.sql bench"),
			}},
			{Title: fmt.Sprintf("%d transactions of each of %d clients", Transactions, Clients), Lines: []string{
				as(fmt.Sprintf("pgbench -n -c %d -t %d bench", Clients, Transactions)),
			}},
			{Title: "start the front", Lines: []string{
				"cp /opt/db/front.socket /etc/systemd/system/", "cp /opt/db/front-answer.service /etc/systemd/system/front@.service",
				"systemctl daemon-reload && systemctl enable --now front.socket",
			}},
		}
	}
	return a
}
