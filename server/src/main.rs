//! The `havenfs` program.

#![forbid(unsafe_code)]

mod cli;
mod demo;

fn main() -> std::process::ExitCode {
    // A bug ends the process at once, whatever thread it is in: a half-dead server is worse than
    // one that is started again.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    cli::run()
}
