// Render an Ollama TEMPLATE over conversations as Ollama's server does (its template.Execute for templates that use
// .Messages): the SYSTEM default goes before a conversation without a system message, neighbours of one role are joined,
// .System is every system message joined. Reads one JSON request from stdin, writes a JSON list of strings to stdout.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type request struct {
	Template      string      `json:"template"`
	System        string      `json:"system"`
	Conversations [][]message `json:"conversations"`
}

func collate(messages []message) (string, []*message) {
	var system []string
	var collated []*message
	for i := range messages {
		if messages[i].Role == "system" {
			system = append(system, messages[i].Content)
		}
		last := len(collated) - 1
		if last >= 0 && collated[last].Role == messages[i].Role && messages[i].Role != "tool" {
			collated[last].Content += "\n\n" + messages[i].Content
		} else {
			collated = append(collated, &messages[i])
		}
	}
	return strings.Join(system, "\n\n"), collated
}

func toJSON(value any) string {
	text, _ := json.Marshal(value)
	return string(text)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func main() {
	var r request
	if err := json.NewDecoder(os.Stdin).Decode(&r); err != nil {
		fail(err)
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": toJSON}).Parse(r.Template)
	if err != nil {
		fail(err)
	}
	rendered := []string{}
	for _, messages := range r.Conversations {
		if r.System != "" && (len(messages) == 0 || messages[0].Role != "system") {
			messages = append([]message{{"system", r.System}}, messages...)
		}
		system, collated := collate(messages)
		var out strings.Builder
		values := map[string]any{"System": system, "Messages": collated, "Response": "", "Think": false, "IsThinkSet": false}
		if err := parsed.Execute(&out, values); err != nil {
			fail(err)
		}
		rendered = append(rendered, out.String())
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(rendered); err != nil {
		fail(err)
	}
}
