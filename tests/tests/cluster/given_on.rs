//! What one service had goes to another one: an address, after the restarts that it takes, and all
//! that a service has that is in the files of no node any more.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use havenfs_tests::cluster::{Cluster, NODES};
use serde_json::Value;

use crate::scene::{ALPHA, BETA, TWO};

/// Changes the configuration files of all nodes.
fn change(cluster: &Cluster, from: &str, to: &str) -> Result<()> {
    for node in NODES {
        let path = cluster.site.config(node);
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains(from), "no `{from}` in {text}");
        fs::write(path, text.replace(from, to))?;
    }
    Ok(())
}

fn error_of(answer: &Value) -> Result<&str> {
    answer["error"].as_str().with_context(|| answer.to_string())
}

fn wait_log(cluster: &Cluster, node: &str, line: &str) -> Result<()> {
    cluster.wait(&format!("{node} says: {line}"), |cluster| {
        cluster.log(node).ok()?.contains(line).then_some(())
    })
}

#[test]
fn an_address_goes_to_another_service_after_a_restart() -> Result<()> {
    Cluster::run(&TWO, |cluster| {
        let [of_alpha, of_beta] = [ALPHA, BETA].map(|name| cluster.site.service(name).to_string());
        let new = of_alpha.replace(".100", ".110");
        change(cluster, &format!("\"{of_alpha}\""), &format!("\"{new}\""))?;
        change(
            cluster,
            &format!("\"{of_beta}\""),
            &format!("\"{of_alpha}\""),
        )?;
        let reload_beta = format!("@{BETA} reload");
        let answer = cluster.ask("n2", &format!("@{ALPHA} reload"))?;
        ensure!(answer["done"].is_string(), "{answer}");
        // Still served with it.
        let answer = cluster.ask("n2", &reload_beta)?;
        let told = "node n1 still serves `alpha`";
        ensure!(error_of(&answer)?.contains(told), "{answer}");
        let answer = cluster.ask("n1", &format!("move {ALPHA} n2"))?;
        ensure!(error_of(&answer)?.contains("restart node n2"), "{answer}");

        cluster.stop("n3")?;
        cluster.restart("n3")?;
        cluster.move_to(ALPHA, "n3")?;
        let answer = cluster.ask("n2", &reload_beta)?;
        ensure!(answer["done"].is_string(), "{answer}");
        // The others would serve it with an address that is another service's.
        wait_log(cluster, "n1", "this node runs with an address that another")?;
        cluster.stop("n1")?;
        cluster.kill("n3")?;
        cluster.restart("n1")?;
        cluster.wait_serving(ALPHA, |serving| serving.node == "n1")?;
        ensure!(cluster.site.service(BETA).to_string() == of_beta);
        Ok(())
    })
}

#[test]
fn what_a_service_had_that_is_in_no_file_any_more_is_free_when_it_is_forgotten() -> Result<()> {
    Cluster::run(&TWO, |cluster| {
        let ask = |cluster: &Cluster, request: &str| cluster.ask("n1", request);
        let answer = ask(cluster, &format!("would-forget {BETA}"))?;
        ensure!(error_of(&answer)?.contains("in its files"), "{answer}");
        // All but the last service of the files.
        for node in NODES {
            let path = cluster.site.config(node);
            let text = fs::read_to_string(&path)?;
            let end = text.rfind("[[service]]").context("no service")?;
            ensure!(text[end..].contains(BETA), "{text}");
            cluster.stop(node)?;
            fs::write(path, &text[..end])?;
            cluster.restart(node)?;
        }
        cluster.wait_serving(ALPHA, |_| true)?;
        // Its files are taken as yet.
        let [of_alpha, of_beta] = [ALPHA, BETA].map(|name| {
            let path = cluster.site.export(name);
            format!("\"{}:", path.display())
        });
        change(cluster, &of_alpha, &of_beta)?;
        let answer = ask(cluster, "reload")?;
        let hint = format!("havenfs service forget {BETA}");
        ensure!(error_of(&answer)?.contains(&hint), "{answer}");

        // The lease of an earlier life of a node may not be over yet.
        let told = cluster.wait("it may be forgotten", |cluster| {
            let answer = ask(cluster, &format!("would-forget {BETA}")).ok()?;
            answer["done"].as_str().map(str::to_owned)
        })?;
        ensure!(told.contains("0 locks"), "{told}");
        let control = cluster.site.control("n1");
        let control = control.to_string_lossy();
        let said = ["service", "forget", BETA, "--yes", "--control", &control];
        let said = cluster.command(&said)?;
        ensure!(said.contains("is forgotten"), "{said}");
        cluster.wait("n2 knows it no more", |cluster| {
            let status = cluster.status("n2").ok()?;
            (status["services"].as_array()?.len() == 1).then_some(())
        })?;
        let answer = ask(cluster, "reload")?;
        ensure!(answer["done"].is_string(), "{answer}");
        Ok(())
    })
}
