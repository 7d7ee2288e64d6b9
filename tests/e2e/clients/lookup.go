// The same with Go's own resolver.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"
)

func main() {
	times, _ := strconv.Atoi(os.Args[2])
	pause, _ := strconv.Atoi(os.Args[3])
	resolver := net.Resolver{PreferGo: true}
	failed := 0
	for ; times > 0; times-- {
		start := time.Now()
		found, err := resolver.LookupIP(context.Background(), "ip", os.Args[1])
		text, why := "none", ""
		for _, ip := range found {
			if v4 := ip.To4(); v4 != nil {
				text = v4.String()
			}
		}
		if err != nil {
			failed++
			why = err.Error()
		}
		fmt.Println(text, time.Since(start).Milliseconds(), why)
		time.Sleep(time.Duration(pause) * time.Millisecond)
	}
	os.Exit(failed)
}
